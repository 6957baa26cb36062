"""Real servers that tests start on loopback. Nothing here tests anything."""
