"""What plugins can add, and what they have added."""

from .registration import registry as registry
