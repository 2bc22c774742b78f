"""A rank that runs the program in its first word."""

import sys

exec(sys.argv[1])
