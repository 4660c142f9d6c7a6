-- Sensitive memories: sealed wherever the database keeps them.

-- What is marked is sealed, and nothing else is: the database refuses to keep it in the clear.
ALTER TABLE memories ADD CONSTRAINT memories_sensitive_are_sealed
    CHECK (sensitive = (sealed IS NOT NULL));
ALTER TABLE memory_versions ADD CONSTRAINT memory_versions_sensitive_are_sealed
    CHECK (sensitive = (sealed IS NOT NULL) AND (sealed IS NULL OR content = ''));

-- A memory that is marked later takes along what it was. History can be sealed, and no more: no
-- other change of it passes.
CREATE POLICY sealing ON memory_versions AS RESTRICTIVE FOR UPDATE TO kimberly_app
    USING (sealed IS NULL) WITH CHECK (sealed IS NOT NULL);
GRANT UPDATE (content, sealed, sensitive, content_hash) ON memory_versions TO kimberly_app;
-- The requests that made it are recognised by a plain hash, which a short secret is guessed from.
GRANT UPDATE (fingerprint) ON requests TO kimberly_app;

ALTER TABLE settings ADD COLUMN index_sensitive boolean NOT NULL DEFAULT false;
COMMENT ON COLUMN settings.index_sensitive IS 'Whether queries find sensitive memories by their words, which are then in the index.';
COMMENT ON COLUMN settings.language_version IS 'The version that brought the language, or another choice that memories are read anew for. 0: never chosen. A job of an earlier one has nothing left to do.';
