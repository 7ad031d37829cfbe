"""What the user names as SOURCE -> rows of text: files, URLs, formats, columns."""
