"""The usage of an exchange: tokens and money.

Usage that Azure reports in a response or a stream, tokens counted or estimated if it reports none, and prices. The
decision whether a request may run belongs to `limits/`.
"""
