"""What is kept: the record of one run and the folder of records."""
