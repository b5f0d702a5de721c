"""The loss and the label maps under other libraries' models; nothing of theirs is imported before it is used."""
