"""From files to batches: readers -> samples -> encoded samples -> padded batches."""
