"""Commands for trained models: chat, sample, score texts, choose among samples, and export."""
