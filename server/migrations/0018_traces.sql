-- What is left behind of texts that are gone.

-- Samples of texts in the planner's statistics outlive the texts; no query needs them.
ALTER TABLE memories        ALTER COLUMN content SET STATISTICS 0,
                            ALTER COLUMN speaker SET STATISTICS 0,
                            ALTER COLUMN sealed  SET STATISTICS 0;
ALTER TABLE memory_versions ALTER COLUMN content SET STATISTICS 0,
                            ALTER COLUMN speaker SET STATISTICS 0,
                            ALTER COLUMN tags    SET STATISTICS 0,
                            ALTER COLUMN sealed  SET STATISTICS 0;

-- Requests are known again for a week: a retry comes sooner, and the hash of a short text could be
-- guessed for ever.
CREATE INDEX requests_by_age ON requests USING brin (created_at);
CREATE POLICY system ON requests TO kimberly_system USING (true);
GRANT SELECT, DELETE ON requests TO kimberly_system;
