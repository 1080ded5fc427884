"""What the good records point at."""


class Nothing:
    """No plugin: nobody imports it to list it."""
