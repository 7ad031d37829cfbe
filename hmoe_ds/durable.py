"""Files that survive a crash of the process or of the machine: what `data_pipeline` writes by, for this package."""

from data_pipeline.durable import flush, make_folder, rename, replace_text, write_text

__all__ = ["flush", "make_folder", "rename", "replace_text", "write_text"]
