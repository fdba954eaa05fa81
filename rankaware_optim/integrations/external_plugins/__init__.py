"""Files that ms-swift loads by their path, from a folder of their own, which it puts in front of sys.path."""
