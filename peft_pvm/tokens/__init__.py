"""What a forward knows of its tokens: which are visual, where runs begin, what the cache remembers of earlier ones."""
