//! What is read of each method's configuration, and what is refused.
