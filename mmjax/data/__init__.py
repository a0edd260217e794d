"""Official files to records, records to padded batches."""
