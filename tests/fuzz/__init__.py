"""Every decoder of bytes from outside, fed with bytes that nobody meant to send."""
