"""Which kernel is fastest: every variant of a matrix product is timed, and the library's table says which it takes.

Shapes come from rewritten models or from the command line (`products`), times from the bench's clock (`session`), what
follows from them for numbers of tokens between those timed is `choice`'s, and the file beside the library `table`'s.
"""
