"""Speed of the operators on a GPU, against every peer that can be imported: see `__main__`."""
