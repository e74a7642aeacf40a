"""How adapters change attention: the call of an attention function, stages that change it, and how they are run."""
