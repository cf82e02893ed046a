"""The `isthmus` command: arguments in, output out. Everything it knows comes from a site over REST."""
