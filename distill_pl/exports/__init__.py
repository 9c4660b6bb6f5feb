"""Students rewritten for programs that do not know this package: `distill-pl export`."""
