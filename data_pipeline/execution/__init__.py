"""Who does the tasks of a build, and what is done already."""
