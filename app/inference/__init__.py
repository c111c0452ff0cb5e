"""What runs the networks: the model store, sessions, the scheduler and the pipeline from picture to people."""
