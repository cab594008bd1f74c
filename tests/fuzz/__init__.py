"""Random configurations of every family, held against transformers' own forward."""
