"""What a server was asked and answered: a file in which a change shows, and reports of it."""
