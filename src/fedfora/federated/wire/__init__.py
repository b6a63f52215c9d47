"""What travels between coordinator and sites, and how it becomes Flower's records and back."""
