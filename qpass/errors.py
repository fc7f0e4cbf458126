"""The one exception that users are meant to see."""


class QpassError(Exception):
    """A mistake that the user can mend.

    The message is one line and says what is wrong, where (file, node, tensor, key or line), and the mend.
    The command line prints it without a traceback and exits with code 2.
    """
