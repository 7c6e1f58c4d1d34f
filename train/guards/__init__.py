"""What keeps a run from ending badly: complete checkpoints, sick losses, lost processes."""
