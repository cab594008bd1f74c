"""What a Transformer is made of, and the one loader and saver."""
