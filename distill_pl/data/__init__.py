"""Text datasets: their files, their packing into token ids on disk, and batches of packed ids."""
