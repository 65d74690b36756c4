"""Every reader of foreign files under random damage: inputs, what reads them, what must hold."""
