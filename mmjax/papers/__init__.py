"""One file a paper: network and objective."""
