"""Where ranks run and who starts them, here or on other machines, and starts them again."""
