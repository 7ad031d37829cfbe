"""What a build does, stage by stage, and the files between: read, map, shuffle by scaffold, reduce, write."""
