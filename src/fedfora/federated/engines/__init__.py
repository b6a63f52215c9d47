"""What carries messages between the coordinator and the simulated sites."""
