"""The one exception that the command line turns into a single line."""


class UserError(Exception):
    """Something the user can put right: a missing folder, a foreign file. Its text is all that is printed."""
