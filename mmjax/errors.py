"""The one exception that stands for a user's mistake."""


class UserError(ValueError):
  """A mistake of the user: the message says what was found, what was expected and what to type.

  The command lines print the message without a traceback and exit with status 2.
  """
