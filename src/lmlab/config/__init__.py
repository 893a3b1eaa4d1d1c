"""From the command line to one frozen object: `schema` says what is allowed, `compose` gets there, `errors` explains."""
