"""Reports for people: the terminal's table and the HTML page."""
