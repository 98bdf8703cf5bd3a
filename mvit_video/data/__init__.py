"""Videos from disk to batches: lists, decoding, sampling, augmentation, loading."""
