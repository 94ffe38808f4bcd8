"""The models of a combination: found, read, checked against each other, and run on ragged key/value caches."""
