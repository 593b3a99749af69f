"""The nouns of the house; knows no method and no domain."""
