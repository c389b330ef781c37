"""What an exchange used: tokens and money.

Usage that Azure reports in a response or a stream, tokens counted or estimated where it reports none, and prices.
Nothing here decides whether a request may run; that is `limits/`.
"""
