//! The layers of a state and its summary: what a view is made of.

use std::sync::Arc;

use super::database::Database;
use super::fault::StorageFault;
use super::overlay::{Base, Layers, Overlay};
use super::summary::{Position, Summary};
use super::view::View;

/// The state from which views are made. It only changes as a whole.
pub(super) struct StoreState {
    pub(super) layers: Layers,
    pub(super) summary: Summary,
    /// The position of the frozen overlay, if there is one.
    pub(super) frozen_position: Position,
    pub(super) durable_position: Position,
    /// Counts calls of [`MetadataStore::freeze`](crate::MetadataStore::freeze), so that a batch detects one since its
    /// beginning.
    pub(super) freezes: u64,
}

impl StoreState {
    /// Returns the state of a database without overlays.
    pub(super) fn open(database: Arc<Database>) -> Result<StoreState, StorageFault> {
        let layers = Layers {
            active: Arc::new(Overlay::new()),
            frozen: None,
            base: Arc::new(Base::open(database)?),
        };
        let summary = Summary::load(&layers)?;
        let position = summary.position.clone();
        Ok(StoreState {
            layers,
            summary,
            frozen_position: position.clone(),
            durable_position: position,
            freezes: 0,
        })
    }

    pub(super) fn view(&self) -> View {
        View::new(self.layers.clone(), self.summary.clone())
    }
}
