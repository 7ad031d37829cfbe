"""One molecule, or a chunk of them: text -> graph, scaffold, complexity and targets. Knows RDKit."""
