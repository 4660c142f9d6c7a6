-- What the conversation around it counts for a memory, beside the other retrieval weights.

ALTER TABLE settings ADD COLUMN session double precision CHECK (session BETWEEN 0 AND 1);
COMMENT ON COLUMN settings.session IS 'What a good match of the same session counts in a query''s ranking. NULL: the mesh''s default.';
