"""Other people's weights in our spine, and ours in theirs."""
