"""Documents that are made from the tables of the code: `python -m docs.generate`, at the root of the repository."""
