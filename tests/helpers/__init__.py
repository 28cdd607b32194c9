"""What tests of several folders share: tiny models, texts and runs, a Hub, the ways to train on several ranks."""
