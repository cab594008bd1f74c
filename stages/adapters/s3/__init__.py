"""S3: one client for all, and what a bucket, an object in parts and a source are made of.

May be imported from here: anything, by `s3_store`, `sources` and flows that reach a file by its URI. Never comes in:
what a store means by an object.
"""
