"""A catalog that is another host's, followed: restored from its replica, kept up to date, never written to."""
