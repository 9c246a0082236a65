"""A package, so that `tests` is this folder whatever else of that name is installed: a regular package that comes first
on the path wins over every other one, a folder without this file over none."""
