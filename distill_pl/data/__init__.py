"""Text datasets, their packing into token ids on disk, and batches of these."""
